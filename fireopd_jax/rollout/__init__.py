"""From prompts to responses: what to draw (`sampling`), and the loop that draws it (`engine`)."""
