# For login shells, whose /etc/profile sets PATH anew.
export PATH=/opt/venv/bin:$PATH
