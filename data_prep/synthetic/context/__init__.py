"""The context world: a forest whose biomass a pixel's own colour doesn't tell, and its surroundings do."""
