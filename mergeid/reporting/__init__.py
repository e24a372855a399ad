"""What is shown: tables, plots, pages."""
