"""Servers that host the service."""
