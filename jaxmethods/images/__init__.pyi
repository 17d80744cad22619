"""Corruptions, augmentation and triggers of one image."""

from jaxmethods.images import (
  augment as augment,
  coats as coats,
  corrupt as corrupt,
  triggers as triggers,
  views as views,
)
from jaxmethods.images.augment import augmix as augmix, normalise as normalise
from jaxmethods.images.views import crop_and_flip as crop_and_flip, weak_view as weak_view
