"""What is checked before a long job: that every device, node and link is what the others are, and what was promised."""
