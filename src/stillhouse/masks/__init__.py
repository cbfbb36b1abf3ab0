"""What is hidden or weighted, by whom and when."""
