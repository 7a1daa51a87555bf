"""What the package costs: error, time and memory beside textbook forms, peers and the limits of the machine."""
