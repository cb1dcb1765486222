"""Help lines of options that several methods have; equal lines become one line of the help."""

LAYERS = "First and last layer to edit, such as 4-20; or those where the classes lie on both sides of the background."
ALL_COMPONENTS = "Also edit components whose score has no stable sign over resamples of the data."
