"""Small shared package: answer checking, rewards, estimators, evaluation. It knows nothing of the methods."""
