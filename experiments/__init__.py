"""Five student reports repeated on real data, and what the maps reveal; stands above training and study, and uses both."""
