"""Models and states on disk, and what they were made with."""
