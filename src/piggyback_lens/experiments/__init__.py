"""Where is it carried: patching, attribution, perturbation and stress, with controls and resumable files."""
