"""Records made legible: tables, figures and the page. No model is ever seen here."""
