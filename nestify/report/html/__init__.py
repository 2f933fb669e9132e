"""A report as one page of HTML that needs nothing else: charts, tables, no script. No torch here."""
