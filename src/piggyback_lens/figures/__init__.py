"""Results as plotly figures. Every function returns the figure; none shows or saves it."""
