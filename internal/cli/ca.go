package cli

import (
	"crypto/x509"
	"fmt"
	"os"
)

// CAs returns the certificates in a file that a flag names.
func CAs(flag, file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("-%s: %w", flag, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("-%s: no certificate in %s", flag, file)
	}
	return pool, nil
}
