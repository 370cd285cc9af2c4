"""Found before the package of this name: a program that needs it fails."""

raise ImportError("this program must run without the packages of this repository")
