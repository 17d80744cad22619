"""A model of images and texts in one space, class prompts and tasks: the stage of GIFT and FPL."""
