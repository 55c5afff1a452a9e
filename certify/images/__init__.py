"""Images to certify: where they come from, how they are decoded, datasets with stable ids."""
