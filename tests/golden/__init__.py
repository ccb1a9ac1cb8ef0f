"""Golden records: what each stage makes of small models, so that it can't change under an unchanged `version`."""
