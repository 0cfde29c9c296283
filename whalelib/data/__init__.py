"""Photographs and what is known of them."""
