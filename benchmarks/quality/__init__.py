"""The table of methods: what each does to one model's quality, on the same evaluation, with variance over seeds."""
