"""Small shared package: answers, rewards, evaluation, run folders, models. It knows nothing of the methods."""
