"""Whole runs into one folder: audit, laboratory, directions, demonstration, and their reports."""
