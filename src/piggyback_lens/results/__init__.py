"""What experiments leave on the disk: runs, which own a folder, and the results in them."""
