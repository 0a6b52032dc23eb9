"""Networks and images as the user names them."""
