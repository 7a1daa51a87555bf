"""The three segmentation experiments: tasks, data, networks, training and reports."""
