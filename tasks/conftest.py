from test_plume import model, small, trained, world
