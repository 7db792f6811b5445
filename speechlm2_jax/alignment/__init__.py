"""Word times for the rows of manifests."""
