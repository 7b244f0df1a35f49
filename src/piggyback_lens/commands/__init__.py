"""Commands of the command line that live outside `cli`. Heavy libraries are imported inside them."""
