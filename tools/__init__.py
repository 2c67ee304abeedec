"""What the build and the developers need, and no installed agent."""
