"""What pretraining is worth: matched runs with few labels, their statistics and the page that shows them."""
