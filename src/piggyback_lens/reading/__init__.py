"""What people bring: question files, training conversations, built-in tasks."""
