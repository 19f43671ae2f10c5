"""Two shapes that move where they point, on textured grounds: the image-to-video model's world."""
