"""Where processes that are killed are forked from: one server, which has imported what they need."""

import multiprocessing

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["pytest", "tests.reliability.warm"])
