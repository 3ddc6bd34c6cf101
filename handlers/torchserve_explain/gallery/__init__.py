"""Every picture of a folder explained: records, and pages to look at."""
