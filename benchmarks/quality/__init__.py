"""The table of methods: the quality of one model under each, on the same evaluation, with variance over seeds."""
