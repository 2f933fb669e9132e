"""Many recipes as jobs, each in a process and a folder of its own. No torch here."""
