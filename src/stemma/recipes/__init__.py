"""One reproduction a method, behind `stemma run METHOD`; pieces that they share start with an underscore."""
