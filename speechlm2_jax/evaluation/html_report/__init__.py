"""The report page: one HTML file with players, pictures and scores."""
