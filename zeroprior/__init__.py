"""The command `zeroprior`: one name for the commands of the packages. It holds no logic itself."""
