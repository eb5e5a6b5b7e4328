"""Stage 1: public data, or the miniature world, to rows. Imports nothing from a later stage."""
