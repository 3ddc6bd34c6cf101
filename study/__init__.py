"""The study of explanation techniques on photos: how stable, faithful, complete, well placed and costly each is."""
