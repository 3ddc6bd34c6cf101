"""What surrounds the server: archives are built, served and shown."""
