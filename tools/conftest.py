from test_plume import few_queries, model, small, trained, world
