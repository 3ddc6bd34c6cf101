"""The attribution engine: torch only; it knows no server, no JSON and no file format."""
