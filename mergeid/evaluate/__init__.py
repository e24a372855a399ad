"""Loss and accuracy, measured; and how near a merge is to its models, without labels."""
