"""A report as one self-contained HTML page with charts and tables, without scripts. No torch here."""
