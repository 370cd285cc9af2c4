"""`svd-report`: figures and the page."""
