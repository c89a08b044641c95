package cli

import (
	"crypto/x509"
	"fmt"
	"os"
)

// CAs returns the certificates in a file that the flag -ca names.
func CAs(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("-ca: no certificate in %s", file)
	}
	return pool, nil
}
