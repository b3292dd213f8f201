"""Steps from one version of the tables to the next. A step that has been released is not edited any more."""
