"""What is saved, and how people hold it."""
