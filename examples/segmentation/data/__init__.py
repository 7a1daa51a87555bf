"""Images and masks: found, checked, split by subject and loaded."""
