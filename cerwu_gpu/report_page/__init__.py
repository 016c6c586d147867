"""The page that every compression leaves: one HTML file, drawn from report.json alone."""
